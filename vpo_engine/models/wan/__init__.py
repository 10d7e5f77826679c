"""Wan 2.1 text to video, 1.3B and 14B, and Wan 2.2 TI2V-5B, through the classes of diffusers."""
