"""The router: a reverse proxy in front of engines that sends a request where its prefix is."""
