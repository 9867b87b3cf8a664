"""The on-host half: runs LoadGen, and knows neither Ansible nor the controller's packages."""
