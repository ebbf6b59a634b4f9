package load

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// However a body is cut into pieces, the text is found just when the whole body holds it.
func TestSearch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		letters := rapid.SliceOfN(rapid.SampledFrom([]byte("ab")), 0, 12)
		want := rapid.SliceOfN(rapid.SampledFrom([]byte("ab")), 0, 4).Draw(t, "want")
		s := search{want: want}
		for range 2 { // used again after a reset
			s.reset()
			var body []byte
			for _, p := range rapid.SliceOf(letters).Draw(t, "pieces") {
				s.add(p)
				body = append(body, p...)
			}
			if s.found != bytes.Contains(body, want) {
				t.Fatalf("%q in %q: found is %v", want, body, s.found)
			}
			if !s.found && !bytes.Equal(s.head, body[:min(len(body), headBytes)]) {
				t.Fatalf("head %q of %q", s.head, body)
			}
		}
	})
}
