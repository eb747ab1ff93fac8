"""Files of records, in the formats that people have."""
