"""What a run of the test bed looks like: one HTML page, complete in itself, with plots as inline SVG and no script."""
