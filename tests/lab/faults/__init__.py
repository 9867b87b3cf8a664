"""What becomes of an outing when something breaks: real hosts, real faults, and the promise that nothing is lost."""
