"""The page of the report: its template, styles and scripts, and the code that joins them."""
