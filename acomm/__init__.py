"""acomm."""
