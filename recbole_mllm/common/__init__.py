"""What every part rests on: errors, settings, files, processes, progress; nothing here knows of the models."""
