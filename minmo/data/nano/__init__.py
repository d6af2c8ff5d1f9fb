"""The nano corpus: numbers and small talk, said by synthetic voices and a few people (`minmo data nano`)."""
