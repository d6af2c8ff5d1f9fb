"""The corpus of the nano model: numbers and small talk, spoken by synthetic voices and a few people; `minmo data nano`."""
