"""Where the server keeps what must survive: records in a database, bytes in files."""
