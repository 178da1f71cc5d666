"""Images made of Debian packages: fetched by apt, unpacked, put together, kept in the user's cache."""
