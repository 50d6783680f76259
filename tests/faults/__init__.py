"""Every fault that can be injected, injected: what takes long, or needs root. Run by `make faults`."""
