"""How the state is kept in one SQLite file. Nobody but the state process imports this."""
