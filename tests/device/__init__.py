"""Tests on a software accelerator, whose copies are as asynchronous as those of a GPU."""
