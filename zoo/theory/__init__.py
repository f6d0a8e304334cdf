"""Papers that prove: their theorems as computations, with what is measured beside what is predicted (`zoo demo`)."""
