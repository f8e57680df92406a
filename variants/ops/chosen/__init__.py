"""Keys and blocks of keys that a query chooses by their content."""
