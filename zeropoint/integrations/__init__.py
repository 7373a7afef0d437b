"""Meeting other libraries where their users are."""
