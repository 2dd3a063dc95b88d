"""What a run will hold, send and cost on machines that need not be there."""
