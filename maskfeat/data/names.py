"""What files and classes may be called."""

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Endings of images, in lower case."""
VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".3gp"),
    *(".ogv", ".vob", ".y4m"),
)
"""Endings of videos, in lower case."""
MAX_CLASS_NAME = 1000
"""Characters of a class name in a file."""
