"""What each stage minimises: modules around a MinMo that turn a batch into sums of losses."""
