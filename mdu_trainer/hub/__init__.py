"""Publishing on the Hub: the list of files, the checks, one commit."""
