"""The library inside the application's interpreter: it imports the standard library and attrs only."""
