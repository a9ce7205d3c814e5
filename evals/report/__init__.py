"""Reports of a run: the same sections as markdown, HTML and text."""
