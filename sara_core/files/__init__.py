"""Files that are either whole or not there, and the state of a run in one."""
