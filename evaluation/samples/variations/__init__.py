"""Other ways to draw than one image for each number.

| file | what |
|---|---|
| `path` | the images between two, or between two seeds |
| `temperatures` | the same noise at several temperatures |
| `best_of` | of several candidates the one of highest likelihood |
| `choose` | which of them a request means, and what contradicts it |
"""
