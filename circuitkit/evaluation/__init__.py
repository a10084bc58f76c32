"""What a circuit does, measured."""
