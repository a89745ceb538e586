"""What goes beyond a prompt and an image: image files, editing, the command line of sample.py."""
