"""AWS for tests: moto behind a layer that breaks what AWS breaks, and lab hosts behind that."""
