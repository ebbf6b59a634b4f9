// Command server is a static Go server without a graceful shutdown: server PORT [SECONDS].
package main

import (
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	var delay float64
	if len(os.Args) > 2 {
		var err error
		if delay, err = strconv.ParseFloat(os.Args[2], 64); err != nil {
			log.Fatal(err)
		}
	}
	log.Fatal(http.ListenAndServe(":"+os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Duration(delay * float64(time.Second)))
		io.WriteString(w, "hello\n")
	})))
}
