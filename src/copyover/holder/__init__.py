"""The long-lived process that keeps the descriptors; it never imports the application."""
