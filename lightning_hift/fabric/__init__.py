"""What knows Lightning Fabric: a strategy, and the precision that leaves masters to be taken first."""
