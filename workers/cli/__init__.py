"""The commands that need the workers' dependencies; found through the entry points `outbox.commands`."""
