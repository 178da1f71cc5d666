"""The report on a run of the test bed: one HTML page, complete in itself, with plots as inline SVG and no script."""
