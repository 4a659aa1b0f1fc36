"""One image: decoding of any format to uint8 pixels, crop, size and flip.

The lowest part of the room: every reader and writer of images comes through here.
"""
