"""How the ops get into the models of other libraries. Each module imports its library at import."""
