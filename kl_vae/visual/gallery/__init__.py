"""A page to look at reconstructions beside their images.

`pages` writes it, with the figures of all pictures as JSON; the parts in web/ are what it shows.
"""

from kl_vae.visual.gallery.pages import GALLERY, GalleryPicture, write_gallery

__all__ = ["GALLERY", "GalleryPicture", "write_gallery"]
