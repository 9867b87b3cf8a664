"""Who: hosts from the campaign, from files, from ssh config; and the way to reach them."""
