"""Side-by-side benchmark of ALISE and stock vLLM on the same machine, requests and arrivals."""
