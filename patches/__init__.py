"""The methods, one file each; the file name is the name users type. `hosts/` holds the places that methods are put into."""
