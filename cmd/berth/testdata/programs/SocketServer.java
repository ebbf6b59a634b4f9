import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.concurrent.Executors;

/** HTTP by hand on a ServerSocket, keeping connections: SocketServer PORT [SECONDS]. */
public class SocketServer {
  public static void main(String[] args) throws Exception {
    long delay = args.length > 1 ? (long) (Double.parseDouble(args[1]) * 1000) : 0;
    var pool = Executors.newCachedThreadPool();
    try (var server = new ServerSocket(Integer.parseInt(args[0]))) {
      while (true) {
        Socket socket = server.accept();
        pool.execute(() -> serve(socket, delay));
      }
    }
  }

  static void serve(Socket socket, long delay) {
    try (socket) {
      var in = new BufferedReader(new InputStreamReader(socket.getInputStream()));
      for (String line; (line = in.readLine()) != null; ) {
        boolean last = false;
        for (; line != null && !line.isEmpty(); line = in.readLine()) {
          last |= line.equalsIgnoreCase("Connection: close");
        }
        if (line == null) return;
        if (delay > 0) Thread.sleep(delay);
        String close = last ? "Connection: close\r\n" : "";
        socket.getOutputStream().write(("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n" + close + "\r\nhello\n").getBytes());
        if (last) return;
      }
    } catch (Exception e) {
      // The client went away.
    }
  }
}
