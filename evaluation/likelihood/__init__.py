"""Exact likelihoods image by image, as a table, a summary and a page.

| file | what |
|---|---|
| `images` | the images to measure: of a data set, or of a folder |
| `per_image` | bits per dimension of every image, by draw of the noise, by block |
| `measure` | the whole of it, by any number of processes together |
| `files` | the table, and the page with the histogram and the extremes |
"""
