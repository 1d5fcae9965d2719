"""What trains when: units and groups of any module tree, their order, schedules and policies."""
