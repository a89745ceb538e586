"""Generation beyond prompt to image: image files, editing, previews, and the options of sample.py for them."""
