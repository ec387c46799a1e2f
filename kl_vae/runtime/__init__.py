"""What every part of the package stands on: device, ranks, files, errors, schema, randomness."""
