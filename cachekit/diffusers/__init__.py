"""The only part of cachekit that knows diffusers."""
