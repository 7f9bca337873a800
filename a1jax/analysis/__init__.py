"""From run directories to tables and figures. Reads what runs wrote; trains nothing."""
