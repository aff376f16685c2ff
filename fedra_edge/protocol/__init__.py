"""The wire contract shared by both sides: values, names, routes and bytes, no behaviour."""
