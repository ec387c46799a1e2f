"""Pictures from latents: of a Gaussian, between images, of posteriors."""
