"""Examples of text as token ids, in batches with their times and mask noise."""
