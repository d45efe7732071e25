"""What a collection says about its images: near-duplicates, outliers, maps, what to label."""
