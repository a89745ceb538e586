"""Everything beyond text to image: image files, editing, interpolation, previews, and sample.py's options for them."""
