"""Images to latents on disk, and back, by any number of processes together.

| file | what |
|---|---|
| `store` | the folder of latents: shards and the record that they depend on |
| `encode` | images -> that folder |
| `decode` | that folder -> images, with every image's round-trip error |
"""
